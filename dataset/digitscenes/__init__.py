"""DigitScenes: small scenes of real handwritten digits, in the public formats of every system
here."""
