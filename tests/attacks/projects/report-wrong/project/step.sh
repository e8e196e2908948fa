#!/bin/sh
mkfifo reports/pipe.xml; ln -s /dev/zero reports/link.xml; mkdir reports/folder.xml
