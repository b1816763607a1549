"""One file a target, each a table of lowerings. What may enter: `ops`, `bundle`."""
