/* Counters: what the engine did, and what it holds.
 *
 * One plain array of atomics for the whole process, so that tests can assert
 * that nothing leaked and metrics cost no call into Python.  The X-list keeps
 * the C enum, the names that Python sees and their order in one place.
 */
#ifndef AU_COUNTERS_H
#define AU_COUNTERS_H

#include <stdatomic.h>
#include <stdint.h>

/* The first three must return to their start value when everything is closed. */
#define AU_COUNTERS(X) \
	X(live_engines) \
	X(live_regions) \
	X(live_slots) \
	X(messages) \
	X(misses) \
	X(hits_in_flight) \
	X(duplicates) \
	X(events) \
	X(spurious) \
	X(installs) \
	X(installed_bytes) \
	X(poisoned_bytes) \
	X(retries_eagain) \
	X(already_present) \
	X(native_serves) \
	X(continues) \
	X(continued_bytes) \
	X(sentry_wakeups) \
	X(sentry_messages) \
	X(kicks) \
	X(signals) \
	X(yields) \
	X(yields_given_way) \
	X(verdict_nogil) \
	X(verdict_proved) \
	X(verdict_kernel) \
	X(verdict_foreign) \
	X(signals_stale) \
	X(signals_unanswered) \
	X(pings) \
	X(rescues) \
	X(stall_poisons) \
	X(guarded_faults) \
	X(renewed_bytes)

enum au_counter {
#define AU_COUNTER_ENUM(name) AU_COUNT_##name,
	AU_COUNTERS(AU_COUNTER_ENUM)
#undef AU_COUNTER_ENUM
	AU_COUNTER_TOTAL
};

extern _Atomic uint64_t au_counters[AU_COUNTER_TOTAL];

static inline void au_count(enum au_counter which, uint64_t amount)
{
	atomic_fetch_add_explicit(&au_counters[which], amount, memory_order_relaxed);
}

/* Name of counter `which`, or NULL past the end. */
const char *au_counter_name(int which);
/* Present value of counter `which`, or 0 past the end. */
uint64_t au_counter_value(int which);

#endif
