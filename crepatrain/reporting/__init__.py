"""The report page of one or several runs: charts, videos, heat map."""
