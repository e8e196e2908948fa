"""The results of a run: values, reports, summaries and a history."""
