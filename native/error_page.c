#include "error_page.h"

#include "abi.h"
#include "counters.h"
#include "engine.h"
#include "mapping.h"
#include "sys.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define FILE_NAME "aiouffd: error page" /* as /proc/PID/maps shows it */
#define DEFAULT_MAP_COUNT 65530ULL

#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#endif
#ifndef MFD_ALLOW_SEALING
#define MFD_ALLOW_SEALING 2U
#endif
#define MFD_NOEXEC_SEAL_ 8U /* 6.3 */
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#endif
#define SEALS (1 | 2 | 4) /* SEAL, SHRINK, GROW: it stays empty */

/* Poison writes a marker into each page table entry, so what was never touched costs page
 * tables: what is larger is a mapping whatever the bound says. */
#define POISON_LIMIT (8ULL << 30)

/* Guards the runs, and AU_PAGE_ERROR_MAPPED in the states of pages.  Held for no system call. */
static pthread_mutex_t runs_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t runs, pieces;
#define RUNS_PER_PIECE 8
static _Atomic uint64_t limit;

/* -------------------------------------------------------- the empty file */

/* A descriptor is a number, which the program may close and use again: so it is known by more. */
static pthread_mutex_t file_lock = PTHREAD_MUTEX_INITIALIZER;
static int file = -1;
static dev_t file_device;
static ino_t file_inode;

/* The descriptor, or -errno. */
static int empty_file(void)
{
	struct stat status;
	int fd;

	if (file >= 0 && fstat(file, &status) == 0 && status.st_dev == file_device &&
	    status.st_ino == file_inode && status.st_size == 0)
		return file;
	fd = (int)syscall(SYS_memfd_create, FILE_NAME,
			  MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL_);
	if (fd < 0 && errno == EINVAL)
		fd = (int)syscall(SYS_memfd_create, FILE_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -errno;
	if (fstat(fd, &status)) {
		close(fd);
		return -EIO;
	}
	fcntl(fd, F_ADD_SEALS, SEALS);
	file_device = status.st_dev;
	file_inode = status.st_ino;
	file = fd;
	return fd;
}

/* vm.max_map_count / 4, without malloc. */
static uint64_t default_limit(void)
{
	uint64_t number = 0;
	char text[32];
	ssize_t size, index;
	int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);

	if (fd >= 0) {
		size = read(fd, text, sizeof text);
		for (index = 0; index < size && text[index] >= '0' && text[index] <= '9'; index++)
			number = number * 10 + (uint64_t)(text[index] - '0');
		close(fd);
	}
	return (number ? number : DEFAULT_MAP_COUNT) / 4;
}

int au_error_prepare(void)
{
	int fd;

	if (!atomic_load(&limit))
		atomic_store(&limit, default_limit());
	pthread_mutex_lock(&file_lock);
	fd = empty_file();
	pthread_mutex_unlock(&file_lock);
	return fd < 0 ? fd : 0;
}

int au_error_map(uint64_t start, uint64_t length, bool inherit)
{
	int fd;

	pthread_mutex_lock(&file_lock);
	fd = empty_file();
	pthread_mutex_unlock(&file_lock);
	if (fd < 0)
		return fd;
	/* By the bare call: ThreadSanitizer takes mmap() for a write, and whoever touches meanwhile
	 * for a race with it. */
	if (syscall(SYS_mmap, start, length, (long)(PROT_READ | PROT_WRITE),
		    (long)(MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE), (long)fd, start) == -1)
		return -errno;
	if (!inherit)
		madvise((void *)(uintptr_t)start, length, MADV_DONTFORK);
	return 0;
}

/* ------------------------------------------------------------- the rule */

static bool is_mapped(const struct au_region *region, uint64_t page)
{
	return page < region->pages && (atomic_load(&region->states[page]) & AU_PAGE_ERROR_MAPPED);
}

/* How many runs there are more when [from, to), or the gap that it leaves, joins or parts them. */
static int64_t runs_joined(const struct au_region *region, uint64_t from, uint64_t to)
{
	return 1 - (from && is_mapped(region, from - 1)) - is_mapped(region, to);
}

static void set_runs(struct au_region *region, int64_t change)
{
	runs += (uint64_t)change;
	region->error_runs += (uint64_t)change;
}

/* Note [from, to) as error mappings if the rule allows. */
static bool take_place(struct au_region *region, uint64_t from, uint64_t to, bool anyway)
{
	uint64_t page;
	int64_t more;
	bool taken;

	pthread_mutex_lock(&runs_lock);
	more = runs_joined(region, from, to);
	taken = anyway || more <= 0 || runs < atomic_load(&limit) ||
		(to - from) << region->page_shift > POISON_LIMIT;
	if (taken) {
		set_runs(region, more);
		for (page = from; page < to; page++)
			atomic_fetch_or(&region->states[page], AU_PAGE_ERROR_MAPPED);
	}
	pthread_mutex_unlock(&runs_lock);
	return taken;
}

static void give_place_back(struct au_region *region, uint64_t from, uint64_t to)
{
	uint64_t page;

	pthread_mutex_lock(&runs_lock);
	for (page = from; page < to; page++)
		atomic_fetch_and(&region->states[page], (uint8_t)~AU_PAGE_ERROR_MAPPED);
	set_runs(region, -runs_joined(region, from, to));
	pthread_mutex_unlock(&runs_lock);
}

static bool inherited(const struct au_region *region)
{
	return region->options & (AU_REGION_FORK | AU_REGION_SERVE);
}

static int map_pages(struct au_region *region, uint64_t from, uint64_t to, bool anyway)
{
	int result;

	if (!take_place(region, from, to, anyway))
		return -ENOSPC;
	result = au_error_map(region->start + (from << region->page_shift),
			      (to - from) << region->page_shift, inherited(region));
	if (result)
		give_place_back(region, from, to);
	return result;
}

static int make(struct au_region *region, uint64_t from, uint64_t to, int uffd, bool closing,
		int64_t *done, uint8_t *state)
{
	int result = map_pages(region, from, to, false), poisoned;

	*done = 0;
	if (result) {
		*state = AU_PAGE_POISONED;
		poisoned = au_abi_poison(uffd, region->start + (from << region->page_shift),
					 (to - from) << region->page_shift, 0, done);
		if (poisoned != -EINVAL && poisoned != -ENOTTY)
			return poisoned;
		if (closing)
			result = map_pages(region, from, to, true);
	}
	if (!result) {
		*state = AU_PAGE_POISONED | AU_PAGE_ERROR_MAPPED;
		*done = (int64_t)((to - from) << region->page_shift);
	}
	return result;
}

int au_error_make(struct au_region *region, uint64_t from, uint64_t to, bool closing, int64_t *done,
		  uint8_t *state)
{
	return make(region, from, to, region->engine->fd, closing, done, state);
}

bool au_error_piece(struct au_region *region)
{
	bool taken;

	pthread_mutex_lock(&runs_lock);
	taken = pieces < atomic_load(&limit) / RUNS_PER_PIECE;
	pieces += taken;
	region->error_pieces += taken;
	pthread_mutex_unlock(&runs_lock);
	return taken;
}

void au_error_forget(struct au_region *region)
{
	pthread_mutex_lock(&runs_lock);
	runs -= region->error_runs;
	pieces -= region->error_pieces;
	region->error_runs = region->error_pieces = 0;
	pthread_mutex_unlock(&runs_lock);
}

uint64_t au_error_runs(void)
{
	uint64_t now;

	pthread_mutex_lock(&runs_lock);
	now = runs;
	pthread_mutex_unlock(&runs_lock);
	return now;
}

void au_error_set_limit(uint64_t most)
{
	atomic_store(&limit, most ? most : default_limit());
}

/* ------------------------------------------------------------- healing */

/* Memory as it belongs at `offset` of the region, somewhere else, in the middle of `room`: were
 * it one mapping with a neighbour there it could not become one with the region. */
struct scratch {
	uint8_t *room, *memory;
	uint64_t room_length, length;
};

static int scratch_map(struct scratch *scratch, const struct au_region *region, uint64_t offset,
		       uint64_t length)
{
	uint64_t edge = region->page_size;
	int result;

	scratch->length = length;
	scratch->room_length = length + 3 * edge;
	scratch->room = mmap(NULL, scratch->room_length, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (scratch->room == MAP_FAILED)
		return -errno;
	scratch->memory = (uint8_t *)(((uintptr_t)scratch->room + 2 * edge - 1) & ~(edge - 1));
	result = au_region_map_anew(region, scratch->memory, offset, length);
	if (result)
		munmap(scratch->room, scratch->room_length);
	return result;
}

/* The middle has gone, and what is there now may be another's. */
static void scratch_leave(const struct scratch *scratch)
{
	uint8_t *end = scratch->memory + scratch->length;

	munmap(scratch->room, (size_t)(scratch->memory - scratch->room));
	munmap(end, (size_t)(scratch->room + scratch->room_length - end));
}

int au_error_undo(struct au_region *region, uint64_t from, uint64_t to)
{
	struct au_engine *engine = region->engine;
	uint64_t offset = from << region->page_shift, length = (to - from) << region->page_shift;
	void *place = (void *)(uintptr_t)(region->start + offset), *moved;
	bool shared = region->memfd >= 0;
	struct scratch scratch = { 0 };
	uint64_t ioctls;
	int result;

	/* Without the event the kernel takes the registration away. */
	if (!(engine->options & AU_ENGINE_REMAPS))
		return -EOPNOTSUPP;
	result = scratch_map(&scratch, region, offset, length);
	if (result)
		return result;
	result = au_abi_register(engine->fd, (uint64_t)(uintptr_t)scratch.memory, length,
				 AU_REGISTER_MODE_MISSING | (shared ? AU_REGISTER_MODE_MINOR : 0),
				 &ioctls);
	if (!result) {
		/* It waits for its event to be read. */
		__atomic_fetch_add(&engine->urgent, 1, __ATOMIC_SEQ_CST);
		moved = mremap(scratch.memory, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place);
		result = moved == MAP_FAILED ? -errno : 0;
		__atomic_fetch_sub(&engine->urgent, 1, __ATOMIC_SEQ_CST);
	}
	if (result) {
		munmap(scratch.room, scratch.room_length);
		/* The place may have been cleared already. */
		au_error_map(region->start + offset, length, inherited(region));
		return result;
	}
	scratch_leave(&scratch);
	give_place_back(region, from, to);
	return 0;
}

/* ------------------------------------------------------ forked children */

void au_error_inherited(struct au_region *region)
{
	uint64_t page, from;

	for (page = 0; page < region->pages; page++) {
		if (!is_mapped(region, page))
			continue;
		for (from = page; is_mapped(region, page); page++)
			atomic_fetch_and(&region->states[page], (uint8_t)~AU_PAGE_ERROR_MAPPED);
		/* Should it fail it remains an error. */
		au_region_map_anew(region, (void *)(uintptr_t)(region->start +
								(from << region->page_shift)),
				    from << region->page_shift, (page - from) << region->page_shift);
	}
}

int au_error_refuse(struct au_region *region, uint64_t from, uint64_t to, int uffd)
{
	int64_t done;
	uint8_t state;

	return make(region, from, to, uffd, true, &done, &state);
}

void au_error_forked(void)
{
	pthread_mutex_init(&runs_lock, NULL);
	pthread_mutex_init(&file_lock, NULL);
	runs = pieces = 0;
}
