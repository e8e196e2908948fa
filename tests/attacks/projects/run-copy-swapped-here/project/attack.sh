echo x >data/new
