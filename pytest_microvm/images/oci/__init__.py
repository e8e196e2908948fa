"""Make images of machines from container images (OCI): of registries, archives, folders, Docker's daemon."""
