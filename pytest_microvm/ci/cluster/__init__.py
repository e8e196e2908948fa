"""Run tasks on several hosts with Dask."""
