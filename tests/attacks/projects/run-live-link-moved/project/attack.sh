mv a/up up
