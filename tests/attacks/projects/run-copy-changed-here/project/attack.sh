echo theirs >notes
