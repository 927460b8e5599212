#include "foreign.h"

#include "abi.h"
#include "engine.h"

#include <errno.h>

#define BASE_PAGE 4096ULL
/* An address that nobody can register: below what the kernel lets be mapped. */
#define NOWHERE 4096ULL

static int issue(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
		 uint64_t page_size, int64_t *done)
{
	*done = 0;
	switch (op) {
	case AU_OP_COPY:
		return au_abi_copy(fd, start, (uint64_t)(uintptr_t)src, length, 0, done);
	case AU_OP_ZERO:
		if (page_size > BASE_PAGE) /* huge pages know no ZEROPAGE */
			return au_abi_copy(fd, start, (uint64_t)(uintptr_t)src, page_size, 0, done);
		return au_abi_zeropage(fd, start, length, 0, done);
	case AU_OP_POISON:
		return au_abi_poison(fd, start, length, 0, done);
	case AU_OP_CONTINUE:
		return au_abi_continue(fd, start, length, 0, done);
	default:
		return -EINVAL;
	}
}

int64_t au_foreign_put(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
		       uint64_t page_size)
{
	uint64_t at = 0, most = length;

	while (at < length) {
		uint64_t part = length - at < most ? length - at : most;
		int64_t done;
		int result = issue(fd, op, start + at, op == AU_OP_COPY ? src + at : src, part,
				   page_size, &done);

		if (done > 0) {
			at += (uint64_t)done;
			continue;
		}
		if (result == -ENOENT && part > page_size) {
			/* Not mapped, or two mappings that one call cannot fill: page by page. */
			most = page_size;
			continue;
		}
		if (result == -EEXIST || result == -ENOENT) {
			au_abi_wake(fd, start + at, page_size);
			at += page_size;
			continue;
		}
		if (result == 0)
			result = -EIO; /* success without a byte: the kernel broke its word */
		return -1 - (int64_t)(at << 8 | (uint64_t)(-result & 0xff));
	}
	return (int64_t)at;
}

int au_foreign_alive(int fd)
{
	int64_t done;

	return au_abi_zeropage(fd, NOWHERE, BASE_PAGE, 0, &done) != -ESRCH;
}
