"""A report as one HTML file that needs nothing else: styles, script and charts are in it, every text of a bundle is escaped."""
