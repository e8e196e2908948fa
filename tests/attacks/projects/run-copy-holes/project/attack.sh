truncate -s 20G large
