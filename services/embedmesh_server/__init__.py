"""The kit that every embedmesh process shares: settings, life cycle, the one interceptor, metrics."""
