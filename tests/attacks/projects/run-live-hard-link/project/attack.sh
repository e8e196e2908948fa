echo x >>notes
