"""Where bytes lie: files of this machine, and what the machine has to read and write them with."""
