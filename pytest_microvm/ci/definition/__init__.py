"""What a project says its CI jobs are: parsed, checked, described for editors."""
