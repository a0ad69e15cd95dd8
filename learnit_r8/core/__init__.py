"""What every room stands on: clocks, random numbers, checks of arguments, states as plain data."""
