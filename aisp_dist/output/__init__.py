"""The output directory: schema, staging, parts, the commit, the lease, and what accounts for it."""
