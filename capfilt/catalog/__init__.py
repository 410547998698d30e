"""DuckDB views over a workspace, and the HTML report."""
