"""`opdkit doctor`: is what `opdkit train` would do right, before money is spent on it?"""
