"""Work on files of texts and on encoders: reading, encoding, training, scoring, drawing. Most of it needs an extra."""
