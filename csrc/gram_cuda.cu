#include "gram.h"
#include "dual_space.h"
