echo "stamp: $(cat stamp.txt)"
