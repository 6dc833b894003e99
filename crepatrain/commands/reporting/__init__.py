"""A run as one HTML page: its curves, tables, videos and alignment map."""
