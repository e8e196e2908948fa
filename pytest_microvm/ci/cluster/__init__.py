"""Tasks on several hosts, with Dask."""
