"""A Django project in one file: a page, and a form that is posted with Django's CSRF check."""

from __future__ import annotations

import os

import django
from django import forms
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template import RequestContext, Template
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    MIDDLEWARE=[
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django_app.says_who_answered",
    ],
    ROOT_URLCONF="django_app",
    SECRET_KEY="for tests",
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
)
django.setup()

PAGE = Template("<form method=post>{% csrf_token %}{{ form }}</form>")


class Greeting(forms.Form):  # type: ignore[misc]
    """One field, which is needed."""

    name = forms.CharField(max_length=50)


def says_who_answered(get_response):  # type: ignore[no-untyped-def]
    """The middleware that the load client needs."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response: HttpResponse = get_response(request)
        response["X-Served-By"] = str(os.getpid())
        return response

    return middleware


def who(_request: HttpRequest) -> HttpResponse:
    return JsonResponse({"pid": os.getpid()})


def greet(request: HttpRequest) -> HttpResponse:
    form = Greeting(request.POST or None)
    if form.is_valid():
        return HttpResponse(f"Hello, {form.cleaned_data['name']}")
    status = 400 if request.method == "POST" else 200
    return HttpResponse(PAGE.render(RequestContext(request, {"form": form})), status=status)


urlpatterns = [path("", who), path("greet", greet)]
app = get_wsgi_application()
