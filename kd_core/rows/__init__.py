"""Row stores: keys, schemas, commits, Parquet shards, verified ranges, and the work of many processes on one table."""
