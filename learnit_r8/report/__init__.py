"""What a finished run leaves behind, made readable: pages, pictures, tables. Nothing here trains."""
