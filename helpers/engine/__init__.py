"""How ranks work together on Dask workers."""
