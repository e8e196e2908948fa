git commit -q --allow-empty -m made
