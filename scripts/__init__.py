"""The commands; also the console commands of the installed package."""
