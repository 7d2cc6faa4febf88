"""The cache of the teacher's work as a user meets it: listed, queried, looked into, verified, repaired, cleaned up."""
