git config core.fsmonitor 'echo fsmonitor >>@MARKER@; false'
