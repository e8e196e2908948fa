echo x >out/new
