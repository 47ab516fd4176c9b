"""Networks: torsos for every observation space, recurrent cores, initialisation, and the actor-critic built of them."""
