"""Takes memory until there is none."""

taken = []
while True:
    taken.append(b"x" * 16 * 1024**2)
