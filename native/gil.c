/* The only file that knows Python: who holds the GIL, and giving it away; and the base class of
 * objects that export their memory.
 *
 * The limited API cannot say which thread state holds the GIL, so the module is
 * built for one Python version.
 *
 *  - From 3.12 on the current thread state is a thread-local variable: not NULL
 *    means that this thread holds its interpreter's GIL.  PyGILState_Check is of no
 *    use: it answers 1 everywhere once a sub-interpreter exists.
 *  - On 3.11 the variable is one for the process: the state of whoever holds the GIL.
 *    It is ours if it is this thread's own state; or, for an interpreter that is run
 *    off the thread that made it, if it says so or its C frame lies on our stack.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "gil.h"

#include "interrupt.h"
#include "kick.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

/* FREE-THREADING: there a thread state may be attached without anything being held, another may be
 * stopped at any touch, and what the GIL proves of others is not proved. */
#ifdef Py_GIL_DISABLED
#error "aiouffd does not support free-threaded builds of Python yet"
#endif

static _Atomic uint32_t taking;

#if PY_VERSION_HEX >= 0x030D0000
bool au_gil_mine(void)
{
	return PyThreadState_GetUnchecked() != NULL;
}
#elif PY_VERSION_HEX >= 0x030C0000
bool au_gil_mine(void)
{
	return _PyThreadState_UncheckedGet() != NULL;
}
#else
/* Does [low, high] lie in one mapping?  Stacks of different threads are parted by
 * guard pages.  Reads /proc in small pieces: the stack may have 32 KiB. */
static bool one_mapping(uintptr_t low, uintptr_t high)
{
	char buffer[512];
	uintptr_t start = 0, end = 0;
	int field = 0, fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	bool found = false;
	ssize_t size, index;

	if (fd < 0)
		return false;
	while (!found && (size = read(fd, buffer, sizeof buffer)) > 0) {
		for (index = 0; index < size && !found; index++) {
			char c = buffer[index];
			uintptr_t digit;

			if (c == '\n') {
				start = end = 0;
				field = 0;
				continue;
			}
			if (field == 2)
				continue;
			if (c == '-' || c == ' ') {
				field++;
				if (field == 2)
					found = low >= start && low < end && high < end;
				continue;
			}
			digit = (uintptr_t)(c <= '9' ? c - '0' : c - 'a' + 10);
			if (field == 0)
				start = start * 16 + digit;
			else
				end = end * 16 + digit;
		}
	}
	close(fd);
	return found;
}

bool au_gil_mine(void)
{
	PyThreadState *holder = _PyThreadState_UncheckedGet();
	PyInterpreterState *interpreter;
	uintptr_t frame, here = (uintptr_t)&holder;

	if (!holder)
		return false;
	if (holder == PyGILState_GetThisThreadState())
		return true;
	/* Without sub-interpreters that was the whole answer, and the holder's state,
	 * which may go at any moment if it is not ours, need not be looked into. */
	interpreter = PyInterpreterState_Head();
	if (!interpreter || !PyInterpreterState_Next(interpreter))
		return false;
	if (holder->thread_id == (unsigned long)pthread_self())
		return true;
	frame = (uintptr_t)holder->cframe;
	if (frame < here || frame - here > (64U << 20))
		return false;
	return one_mapping(here, frame);
}
#endif

bool au_gil_only(void)
{
	/* Interpreters are added in front, so nothing needs to be looked into. */
	return PyInterpreterState_Head() == PyInterpreterState_Main();
}

void *au_gil_release(void)
{
	return PyEval_SaveThread();
}

static void park_for_ever(void)
{
	for (;;)
		pause();
}

void au_gil_take(void *token)
{
	/* At finalization PyEval_RestoreThread ends the thread by unwinding its stack,
	 * through frames of the interrupted code that may not be unwound. */
	atomic_fetch_add(&taking, 1);
	if (__atomic_load_n(&au_shared.exiting, __ATOMIC_SEQ_CST) &&
	    (pid_t)au_gettid() != getpid()) {
		atomic_fetch_sub(&taking, 1);
		park_for_ever();
	}
	PyEval_RestoreThread((PyThreadState *)token);
	atomic_fetch_sub(&taking, 1);
}

void au_gil_exit(void)
{
	int tries;

	__atomic_store_n(&au_shared.exiting, 1, __ATOMIC_SEQ_CST);
	for (tries = 0; tries < 1000 && atomic_load(&taking); tries++)
		au_sleep_ns(AU_NS_PER_MS);
}

/* CPython 3.15 begins its end anew for as long as it has a thread state that `threading` made for a
 * thread which is no daemon, and a thread that is left behind never gives up its own.  Which kind a
 * state is was said when it was made, and no function changes that.  So it is copied from a state
 * that is as it should be, whatever that looks like.  rescue.py notices if it was in vain. */
int au_gil_leave_behind(uint32_t left, uint32_t daemon)
{
	int result = 0;
#if PY_VERSION_HEX >= 0x030F0000 && PY_VERSION_HEX < 0x03100000
	PyGILState_STATE gil = PyGILState_Ensure();
	PyThreadState *state, *from = NULL, *to = NULL;

	for (state = PyInterpreterState_ThreadHead(PyInterpreterState_Main()); state;
	     state = PyThreadState_Next(state)) {
		if (state->native_thread_id == left)
			to = state;
		else if (state->native_thread_id == daemon)
			from = state;
	}
	if (from && to)
		to->_whence = from->_whence;
	else
		result = -ESRCH;
	PyGILState_Release(gil);
#else
	(void)left;
	(void)daemon;
#endif
	return result;
}

/* `_export` returns a memoryview, and it is that memoryview that users of the buffer hold on to.
 *
 * PEP 688's `__buffer__` would do from Python 3.12 on, but not well enough. torch.frombuffer() gives the
 * Py_buffer back at once and keeps `view.obj`: a memoryview here, there a wrapper that lets go of
 * the memory with the Py_buffer. And NumPy keeps the object that it was given, unless its type has a
 * bf_releasebuffer: then it makes a memoryview of it. See findings/pep688_frombuffer.sh.
 */
static int export_buffer(PyObject *self, Py_buffer *view, int flags)
{
	PyObject *memory = PyObject_CallMethod(self, "_export", NULL);
	int result;

	view->obj = NULL;
	if (!memory)
		return -1;
	result = PyObject_GetBuffer(memory, view, flags);
	Py_DECREF(memory);
	return result;
}

/* Never called: `view->obj` is the memoryview. */
static void release_buffer(PyObject *self, Py_buffer *view)
{
	(void)self;
	(void)view;
}

static PyType_Slot exporter_slots[] = {
	{ Py_bf_getbuffer, export_buffer },
	{ Py_bf_releasebuffer, release_buffer },
	{ Py_tp_doc, "An object whose `_export` returns a memoryview of the memory that it exports." },
	{ 0, NULL },
};

static PyType_Spec exporter_spec = {
	.name = "aiouffd.regions.exporter.Exporter",
	.basicsize = sizeof(PyObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = exporter_slots,
};

int au_python_exporter(const char *module)
{
	PyGILState_STATE gil = PyGILState_Ensure();
	PyObject *type = PyType_FromSpec(&exporter_spec), *where = PyImport_ImportModule(module);
	int result = -1;

	if (type && where)
		result = PyObject_SetAttrString(where, "Exporter", type);
	PyErr_Clear();
	Py_XDECREF(type);
	Py_XDECREF(where);
	PyGILState_Release(gil);
	return result;
}

struct place {
	uintptr_t ours, other;
	bool same;
};

/* dl_iterate_phdr(3): ends with the object that `ours` is a part of. */
static int look_into(struct dl_phdr_info *object, size_t size, void *argument)
{
	struct place *place = argument;
	bool ours = false, other = false;
	int index;

	(void)size;
	for (index = 0; index < object->dlpi_phnum; index++) {
		const ElfW(Phdr) *part = &object->dlpi_phdr[index];
		uintptr_t start = object->dlpi_addr + part->p_vaddr;

		if (part->p_type != PT_LOAD)
			continue;
		ours |= place->ours - start < part->p_memsz;
		other |= place->other - start < part->p_memsz;
	}
	place->same = ours && other;
	return ours;
}

void au_gil_know_handler(void)
{
	PyOS_sighandler_t handler = PyOS_getsig(SIGINT);
	struct place place = { .ours = (uintptr_t)&PyOS_getsig, .other = (uintptr_t)handler };

	/* Code in C may have put one in its place since, of which Python does not know. */
	dl_iterate_phdr(look_into, &place);
	if (place.same)
		au_interrupt_know(handler);
}
