"""Plain-torch truth of every operation the engine and the trainer share; float64 where its inputs are.

These run where there is no faster form (`kernels.dispatch`), and are what every faster form is compared with.
"""
