"""What the storage promises, held against every database that it speaks."""
