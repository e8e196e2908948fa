ls >/dev/null
