"""What a run leaves: results, reports, summaries, a history."""
