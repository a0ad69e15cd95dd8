"""Numbers to cells: panes, charts and glyphs, without a terminal."""
