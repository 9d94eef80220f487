"""What other trainers call, by their names and signatures; one file for each. None of them is imported here."""
