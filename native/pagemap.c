#include "pagemap.h"

#include "sys.h"

#include <fcntl.h>
#include <stdatomic.h>

/* Process and descriptor in one word, so that a child cannot mix them up. */
static _Atomic uint64_t opened;

static int descriptor(void)
{
	uint64_t before = atomic_load(&opened), after, own = (uint64_t)getpid();
	int fd;

	if (before >> 32 == own)
		return (int)(uint32_t)before;
	fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fd;
	after = own << 32 | (uint32_t)fd;
	if (!atomic_compare_exchange_strong(&opened, &before, after)) {
		/* Another thread was faster. */
		close(fd);
		return (int)(uint32_t)before;
	}
	if (before)
		close((int)(uint32_t)before); /* the parent's */
	return fd;
}

bool au_pagemap_read(uint64_t address, uint64_t *items, uint64_t count)
{
	uint64_t base = au_page_size();
	ssize_t size = (ssize_t)(count * sizeof *items);
	int fd = descriptor();

	return fd >= 0 &&
	       pread(fd, items, (size_t)size, (off_t)(address / base * sizeof *items)) == size;
}

void au_pagemap_forked(void)
{
	uint64_t before = atomic_exchange(&opened, 0);

	if (before)
		close((int)(uint32_t)before);
}
