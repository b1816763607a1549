"""What a person looks at: tables, plots and JSON of results."""
