/* The GIL yield: threads that touch missing pages while they hold what the loop needs. */
#include "harness.h"

#include "handler.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

static struct bench bench;

static void open_yielding(uint64_t pages)
{
	bench_open(&bench, (struct setup){ .length = pages * PAGE, .block = 1,
					   .engine_options = AU_ENGINE_YIELD });
}

/* What the native core says to people would disturb the list of tests. */
static void quiet(void)
{
	if (!freopen("/dev/null", "w", stderr))
		_exit(1);
}

static void *holder(void *argument)
{
	uint64_t first = (uint64_t)(uintptr_t)argument, page;

	for (page = first; page < first + 32; page++) {
		gil_take();
		CHECK_EQ(touch(bench.region, page * PAGE + 1), pattern(page * PAGE + 1));
		CHECK(au_gil_mine());
		gil_give();
	}
	return NULL;
}

static void *free_toucher(void *argument)
{
	uint64_t first = (uint64_t)(uintptr_t)argument, page;

	for (page = first; page < first + 32; page++)
		CHECK_EQ(touch(bench.region, page * PAGE + 9), pattern(page * PAGE + 9));
	return NULL;
}

static void one_holder(void)
{
	struct loop loop = { .needs_gil = true };

	open_yielding(32);
	loop_start(&loop, &bench);
	join(spawn(holder, NULL));
	CHECK(counted(AU_COUNT_yields) > 0);
	CHECK(counted(AU_COUNT_signals) <= 2 * 32);
	loop_stop(&loop);
	bench_close(&bench);
}

static void holders_and_others(void)
{
	struct loop loop = { .needs_gil = true };
	pthread_t threads[8];
	uintptr_t index;

	open_yielding(32 * 4);
	loop_start(&loop, &bench);
	for (index = 0; index < 8; index++)
		threads[index] = spawn(index % 2 ? holder : free_toucher, (void *)(index / 2 * 32));
	for (index = 0; index < 8; index++)
		join(threads[index]);
	loop_stop(&loop);
	bench_close(&bench);
}

/* A thread without the GIL that waits long is asked once or twice, not for ever. */
static void *touch_one(void *argument)
{
	uint64_t offset = (uint64_t)(uintptr_t)argument;

	CHECK_EQ(touch(bench.region, offset), pattern(offset));
	return NULL;
}

static void long_wait_without_gil(void)
{
	struct au_entry entry;
	pthread_t thread;
	uint64_t until = au_now_ns() + 1500 * AU_NS_PER_MS;
	int error;

	open_yielding(4);
	thread = spawn(touch_one, NULL);
	while (au_now_ns() < until) {
		au_engine_drain(bench.engine, &entry, 1, AU_DRAIN_LOOP);
		au_sleep_ns(AU_NS_PER_MS);
	}
	CHECK(counted(AU_COUNT_signals) >= 1);
	CHECK(counted(AU_COUNT_signals) <= 2);
	install_pattern(bench.region, 0, PAGE, &error);
	join(thread);
	bench_close(&bench);
}

/* The same thread may wait without the GIL, be called away, and come back with it. */
static volatile int come_with_gil;

static void takes_gil(int number)
{
	(void)number;
	if (!come_with_gil) {
		come_with_gil = 1;
		gil_take();
	}
}

static void *touch_twice(void *argument)
{
	CHECK_EQ(touch(bench.region, 0), pattern(0));
	CHECK(au_gil_mine());
	gil_give();
	return argument;
}

static void comes_back_with_gil(void)
{
	struct loop loop = { .needs_gil = true, .think_ns = 0 };
	struct sigaction action = { .sa_handler = takes_gil };
	pthread_t thread;

	sigaction(SIGUSR1, &action, NULL);
	open_yielding(4);
	thread = spawn(touch_twice, NULL);
	EVENTUALLY(counted(AU_COUNT_verdict_nogil) + counted(AU_COUNT_verdict_proved) > 0);
	/* Both signals at once would be one repetition of the fault, and only the rescue loop,
	 * which is not here, would make the sentry ask once more. */
	au_sleep_ns(20 * AU_NS_PER_MS);
	pthread_kill(thread, SIGUSR1);
	EVENTUALLY(come_with_gil);
	au_sleep_ns(5 * AU_NS_PER_MS);
	loop_start(&loop, &bench); /* which needs the GIL that the toucher now has */
	join(thread);
	loop_stop(&loop);
	bench_close(&bench);
}

/* ----------------------------------------------------------- kernel mode */

static _Atomic int user_signals;

static void count_signal(int number)
{
	(void)number;
	atomic_fetch_add(&user_signals, 1);
}

static int ends[2];

static void *writes(void *argument)
{
	(void)argument;
	return (void *)(intptr_t)(write(ends[1], at(bench.region, 3 * PAGE - 50), 100) == 100 ? 0 :
											       errno);
}

static void kernel_mode(void)
{
	struct loop loop = { .needs_gil = true, .think_ns = 30 * AU_NS_PER_MS };
	struct sigaction action = { .sa_handler = count_signal, .sa_flags = SA_RESTART };
	uint8_t bytes[100];
	pthread_t thread;
	int round;

	sigaction(SIGUSR1, &action, NULL);
	CHECK_EQ(pipe(ends), 0);
	open_yielding(4);
	loop_start(&loop, &bench);
	thread = spawn(writes, NULL);
	for (round = 0; round < 20; round++) {
		pthread_kill(thread, SIGUSR1);
		au_sleep_ns(AU_NS_PER_MS);
	}
	CHECK_EQ((intptr_t)join(thread), 0);
	CHECK_EQ(read(ends[0], bytes, 100), 100);
	CHECK(pattern_holds(bytes, 3 * PAGE - 50, 100));
	CHECK(atomic_load(&user_signals) > 0);
	CHECK_EQ(counted(AU_COUNT_yields), 0);
	CHECK_EQ(counted(AU_COUNT_signals), 0); /* with one pending the fault would spin */
	loop_stop(&loop);
	bench_close(&bench);
}

static void *writes_with_gil(void *argument)
{
	gil_take();
	argument = writes(argument);
	gil_give();
	return argument;
}

/* In the kernel with the GIL: it cannot give it away, so it gets an error. */
static void kernel_mode_with_gil(void)
{
	struct loop loop = { .needs_gil = true }, rescue = { .needs_gil = true, .rescue = true };
	struct au_note note;

	quiet();
	CHECK_EQ(pipe(ends), 0);
	open_yielding(4);
	au_engine_set_times(bench.engine, 50000, 10 * AU_NS_PER_MS, 300 * AU_NS_PER_MS);
	loop_start(&loop, &bench);
	loop_start(&rescue, &bench);
	CHECK_EQ((intptr_t)join(spawn(writes_with_gil, NULL)), EFAULT);
	CHECK(counted(AU_COUNT_stall_poisons) >= 1);
	CHECK(au_sentry_take_note(&note));
	loop_stop(&loop);
	loop_stop(&rescue);
	bench_close(&bench);
}

/* --------------------------------------------------------------- signals */

/* 1 kHz of another signal: each wait gives way, nothing is lost and nobody hangs. */
static void alarm_storm(void)
{
	struct loop loop = { .needs_gil = true, .think_ns = 3 * AU_NS_PER_MS };
	struct sigaction action = { .sa_handler = count_signal, .sa_flags = SA_RESTART };
	struct itimerval every = { { 0, 1000 }, { 0, 1000 } }, never = { { 0, 0 }, { 0, 0 } };

	sigaction(SIGALRM, &action, NULL);
	open_yielding(32);
	loop_start(&loop, &bench);
	setitimer(ITIMER_REAL, &every, NULL);
	holder(NULL); /* on the main thread, which the kernel prefers for the signal */
	setitimer(ITIMER_REAL, &never, NULL);
	CHECK(atomic_load(&user_signals) > 10);
	CHECK(counted(AU_COUNT_yields) > 0);
	loop_stop(&loop);
	bench_close(&bench);
}

/* A signal that is due while a thread is yielded does not wait for the page. */
static void gives_way(void)
{
	struct sigaction action = { .sa_handler = count_signal, .sa_flags = SA_RESTART };
	struct au_entry entry;
	pthread_t thread;
	int error, round;

	sigaction(SIGUSR1, &action, NULL);
	open_yielding(32);
	thread = spawn(holder, NULL);
	for (round = 1; round <= 3; round++) {
		EVENTUALLY((au_engine_drain(bench.engine, &entry, 1, AU_DRAIN_LOOP),
			    counted(AU_COUNT_yields) >= (uint64_t)round));
		pthread_kill(thread, SIGUSR1);
		EVENTUALLY(atomic_load(&user_signals) == round);
		CHECK_EQ(counted(AU_COUNT_yields_given_way), round);
	}
	install_pattern(bench.region, 0, 32 * PAGE, &error);
	join(thread);
	bench_close(&bench);
}

/* A signal out of the blue does nothing. */
static void stale_signals(void)
{
	uint64_t stale;
	bool duplicate;
	int round;

	open_yielding(4);
	stale = counted(AU_COUNT_signals_stale);
	gil_take();
	for (round = 0; round < 200; round++) {
		struct au_slot *slot = NULL;

		if (round % 2) { /* a slot of ours, but of another place in the program */
			slot = au_slot_claim(bench.engine, au_gettid(), 0x1000, PAGE, 0,
					     &duplicate);
			atomic_store(&slot->signalled_at, au_now_ns());
			atomic_store(&slot->sp, 1);
			atomic_store(&slot->pc, 1);
			au_slot_publish(slot);
		}
		CHECK_EQ(au_handler_send(au_gettid()), 0);
		CHECK(au_gil_mine());
		if (slot)
			au_slots_end(bench.engine, 0x1000, 0x2000);
	}
	gil_give();
	CHECK_EQ(counted(AU_COUNT_yields), 0);
	CHECK(counted(AU_COUNT_signals_stale) >= stale + 150);
	bench_close(&bench);
}

/* Somebody resets all signals to their defaults, as some programs do before exec: our
 * signal must not kill the process. */
static void handler_was_reset(void)
{
	struct loop loop = { .needs_gil = true };
	struct sigaction action = { .sa_handler = SIG_DFL };

	open_yielding(32);
	sigaction(au_handler_signal(), &action, NULL);
	loop_start(&loop, &bench);
	join(spawn(holder, NULL));
	CHECK(counted(AU_COUNT_yields) > 0);
	loop_stop(&loop);
	bench_close(&bench);
}

/* Somebody else takes our number: we move to another, and never call them. */
static void handler_was_replaced(void)
{
	struct loop loop = { .needs_gil = true };
	struct sigaction action = { .sa_handler = count_signal };
	int number;

	open_yielding(32);
	number = au_handler_signal();
	sigaction(number, &action, NULL);
	loop_start(&loop, &bench);
	join(spawn(holder, NULL));
	CHECK(au_handler_signal() != number);
	CHECK_EQ(atomic_load(&user_signals), 0);
	pthread_kill(pthread_self(), number);
	CHECK_EQ(atomic_load(&user_signals), 1);
	loop_stop(&loop);
	bench_close(&bench);
}

/* All real-time signals were taken before us: we share one, and its owner gets what is
 * sent to it in every way. */
static void foreign_user(void)
{
	struct loop loop = { .needs_gil = true };
	struct sigaction action = { .sa_handler = count_signal };
	union sigval value = { .sival_int = 3 };
	int number;

	for (number = SIGRTMIN; number <= SIGRTMAX; number++)
		sigaction(number, &action, NULL);
	open_yielding(32);
	number = au_handler_signal();
	loop_start(&loop, &bench);
	join(spawn(holder, NULL));
	CHECK(counted(AU_COUNT_yields) > 0);
	CHECK_EQ(atomic_load(&user_signals), 0);
	CHECK_EQ(sigqueue(getpid(), number, value), 0);
	EVENTUALLY(atomic_load(&user_signals) == 1);
	CHECK_EQ(kill(getpid(), number), 0);
	EVENTUALLY(atomic_load(&user_signals) == 2);
	CHECK_EQ(pthread_kill(pthread_self(), number), 0);
	EVENTUALLY(atomic_load(&user_signals) == 3);
	loop_stop(&loop);
	bench_close(&bench);
}

/* All is blocked in our own handler as well, but nobody is to blame for that. */
static void *holds_once(void *argument)
{
	(void)argument;
	gil_take();
	CHECK_EQ(touch(bench.region, 1), pattern(1));
	gil_give();
	return NULL;
}

static void slow_handler(void)
{
	struct loop loop = { .needs_gil = true };
	struct au_note note;
	uint64_t lost = 0;

	open_yielding(4);
	loop_start(&loop, &bench);
	atomic_store(&gil_look_ns, 100 * AU_NS_PER_MS);
	join(spawn(holds_once, NULL));
	while (au_sentry_take_note(&note))
		lost += note.kind == AU_NOTE_MASKED;
	CHECK_EQ(lost, 0);
	CHECK(counted(AU_COUNT_yields) > 0);
	loop_stop(&loop);
	bench_close(&bench);
}

/* Our signal is blocked in a thread that holds the GIL: reported, and an error. */
static void *masked_reader(void *argument)
{
	uint64_t where = 0;
	uint8_t byte;
	sigset_t ours;
	int result;

	sigemptyset(&ours);
	sigaddset(&ours, au_handler_signal());
	pthread_sigmask(SIG_BLOCK, &ours, NULL);
	gil_take();
	result = au_region_read(bench.region, 0, &byte, 1, &where);
	gil_give();
	return (void *)((intptr_t)result + (intptr_t)argument);
}

static void masked(void)
{
	struct loop loop = { .needs_gil = true }, rescue = { .needs_gil = true, .rescue = true };
	struct au_note note;
	bool noted = false;

	quiet();
	open_yielding(4);
	au_engine_set_times(bench.engine, 50000, 10 * AU_NS_PER_MS, 300 * AU_NS_PER_MS);
	loop_start(&loop, &bench);
	loop_start(&rescue, &bench);
	CHECK_EQ((intptr_t)join(spawn(masked_reader, NULL)), -EIO);
	while (au_sentry_take_note(&note))
		noted |= note.kind == AU_NOTE_MASKED;
	CHECK(noted);
	loop_stop(&loop);
	loop_stop(&rescue);
	bench_close(&bench);
}

/* ------------------------------------------------------------- tight spots */

/* No descriptor is free: the sentry must still see where a thread waits. */
static void no_free_descriptor(void)
{
	struct loop loop = { .needs_gil = true };
	struct rlimit limit = { 64, 64 };

	open_yielding(32);
	loop_start(&loop, &bench);
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
	while (dup(bench.fd) >= 0)
		;
	CHECK_EQ(errno, EMFILE);
	join(spawn(holder, NULL));
	CHECK(counted(AU_COUNT_yields) > 0);
	_exit(0); /* the leak checker would want descriptors */
}

/* A long computation holds the GIL while others, without it, wait for pages: slow, but
 * nothing is stuck, and nobody may be killed for it. */
static void *computes(void *argument)
{
	uint64_t until;

	gil_take();
	until = au_now_ns() + (uint64_t)(uintptr_t)argument;
	while (au_now_ns() < until)
		;
	gil_give();
	return NULL;
}

static void long_computation(void)
{
	struct loop loop = { .needs_gil = true }, rescue = { .needs_gil = true, .rescue = true };
	pthread_t busy, thread;

	quiet();
	open_yielding(4);
	au_engine_set_times(bench.engine, 50000, 10 * AU_NS_PER_MS, 200 * AU_NS_PER_MS);
	loop_start(&loop, &bench);
	loop_start(&rescue, &bench);
	busy = spawn(computes, (void *)(uintptr_t)(1000 * AU_NS_PER_MS));
	au_sleep_ns(20 * AU_NS_PER_MS);
	thread = spawn(touch_one, NULL);
	join(thread);
	join(busy);
	loop_stop(&loop);
	loop_stop(&rescue);
	bench_close(&bench);
}

/* The loop's own thread touches: the rescue loop serves. */
static void *touches_as_loop(void *argument)
{
	uint64_t page;

	au_engine_set_loop(bench.engine, au_gettid());
	gil_take();
	for (page = 0; page < 8; page++)
		CHECK_EQ(touch(bench.region, page * PAGE), pattern(page * PAGE));
	gil_give();
	return argument;
}

static void loop_touches_itself(void)
{
	struct loop rescue = { .needs_gil = true, .rescue = true };
	struct au_note note;

	open_yielding(8);
	loop_start(&rescue, &bench);
	join(spawn(touches_as_loop, NULL));
	CHECK(au_sentry_take_note(&note));
	CHECK_EQ(note.kind, AU_NOTE_SELF_TOUCH);
	loop_stop(&rescue);
	bench_close(&bench);
}

/* The loop does not come, a worker waits: after its patience the rescue loop serves. */
static void loop_is_stuck(void)
{
	struct loop rescue = { .needs_gil = true, .rescue = true };

	open_yielding(32);
	au_engine_set_times(bench.engine, 50000, 5 * AU_NS_PER_MS, 10 * AU_NS_PER_S);
	au_engine_set_loop(bench.engine, au_gettid());
	loop_start(&rescue, &bench);
	join(spawn(holder, NULL));
	CHECK(counted(AU_COUNT_rescues) > 0);
	loop_stop(&rescue);
	bench_close(&bench);
}

/* One holds the GIL and its own lock; the rest want that lock with the GIL held.  Nobody
 * can help, so the process says so and ends. */
static pthread_mutex_t own_lock = PTHREAD_MUTEX_INITIALIZER;

static void *locks_then_touches(void *argument)
{
	gil_take();
	pthread_mutex_lock(&own_lock);
	touch(bench.region, 0);
	pthread_mutex_unlock(&own_lock);
	gil_give();
	return argument;
}

static void lock_inside_c(void)
{
	struct loop loop = { .needs_gil = true }, rescue = { .needs_gil = true, .rescue = true };

	quiet();
	open_yielding(4);
	au_engine_set_times(bench.engine, 50000, 10 * AU_NS_PER_MS, 200 * AU_NS_PER_MS);
	spawn(locks_then_touches, NULL);
	EVENTUALLY(counted(AU_COUNT_yields) == 1);
	gil_take();
	loop_start(&loop, &bench);
	loop_start(&rescue, &bench);
	pthread_mutex_lock(&own_lock);
	_exit(1);
}

const struct test yield_tests[] = {
	{ "yield: a thread that holds the GIL", one_holder, 0, TSAN_DEFERS },
	{ "yield: threads with and without the GIL", holders_and_others, 0, TSAN_DEFERS },
	{ "yield: at most two signals for a long wait", long_wait_without_gil, 0, TSAN_DEFERS },
	{ "yield: a thread that comes back with the GIL", comes_back_with_gil, 0, TSAN_DEFERS },
	{ "yield: a system call is never signalled", kernel_mode, 0, NULL },
	{ "yield: a system call with the GIL held gets an error", kernel_mode_with_gil, 0, NULL },
	{ "yield: under a storm of SIGALRM", alarm_storm, 0, TSAN_DEFERS },
	{ "yield: gives way to a signal that is due", gives_way, 0, TSAN_DEFERS },
	{ "yield: stale signals do nothing", stale_signals, 0, TSAN_DEFERS },
	{ "yield: the handler was reset", handler_was_reset, 0, TSAN_DEFERS },
	{ "yield: the handler was replaced", handler_was_replaced, 0, TSAN_DEFERS },
	{ "yield: a foreign user of the same signal", foreign_user, 0, TSAN_DEFERS },
	{ "yield: a handler that takes its time", slow_handler, 0, TSAN_DEFERS },
	{ "yield: our signal is blocked", masked, 0, TSAN_DEFERS },
	{ "yield: no descriptor is free", no_free_descriptor, 0, TSAN_DEFERS },
	{ "yield: a long computation kills nobody", long_computation, 0, TSAN_DEFERS },
	{ "yield: the loop touches itself", loop_touches_itself, 0, TSAN_DEFERS },
	{ "yield: the loop does not come", loop_is_stuck, 0, TSAN_DEFERS },
	{ "yield: a lock inside C ends the process", lock_inside_c, SIGABRT, TSAN_DEFERS },
	{ 0 },
};
