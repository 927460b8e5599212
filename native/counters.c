#include "counters.h"

#include <stddef.h>

_Atomic uint64_t au_counters[AU_COUNTER_TOTAL];

static const char *const names[AU_COUNTER_TOTAL] = {
#define AU_COUNTER_NAME(name) #name,
	AU_COUNTERS(AU_COUNTER_NAME)
#undef AU_COUNTER_NAME
};

const char *au_counter_name(int which)
{
	return which >= 0 && which < AU_COUNTER_TOTAL ? names[which] : NULL;
}

uint64_t au_counter_value(int which)
{
	if (which < 0 || which >= AU_COUNTER_TOTAL)
		return 0;
	return atomic_load_explicit(&au_counters[which], memory_order_relaxed);
}
