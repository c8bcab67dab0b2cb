"""What an instance goes through from its start to its exit."""
