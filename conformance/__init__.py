"""Does a subject compute what golden defines, to the precision it claims?"""
