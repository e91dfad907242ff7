"""What differs between devices: functions of torch's backends, memory, streams, and which devices are here."""
