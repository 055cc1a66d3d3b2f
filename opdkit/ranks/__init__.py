"""The processes of one run ("ranks"): what they tell each other, and who does what."""
