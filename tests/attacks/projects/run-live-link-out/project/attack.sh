ln -s @FOLDER@ out
