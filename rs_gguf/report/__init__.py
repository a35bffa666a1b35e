"""What a finished run is told with: its results read and judged, drawn, listed, and put into words."""
